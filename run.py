"""The one door: `python run.py experiment=… key=value`; `--help` lists the recipes."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()

"""Students: models made, loaded or cut from others, always ordinary models of their library."""

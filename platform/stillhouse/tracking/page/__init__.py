"""The page of a comparison, `report.html`: one file that needs no network and no server.

`records` says what the page is made of; a section a module turns records into markup; `html` and
`svg` write markup; `page` puts the sections together with `page.css` and `page.js`. Tables are
whole without scripts: those add sorting, filtering, the light on one setting and tips of charts.
"""

"""Query the log and present the results: the page, tail, report and export. Writes no rows."""

"""How samples and targets become the columns of a data file: `plain` lists, or `compact` packed rows."""

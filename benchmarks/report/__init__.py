"""The output for readers: tables in the terminal, plots, one page with everything, and sections of documents."""

"""What a reader sees: tables in the terminal, plots, and one page with everything."""

"""What happened: step reports, meters and the writers that show them."""

"""What happened: step reports, timers, meters and the writers that show them."""

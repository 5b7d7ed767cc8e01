"""What the user asked: frozen, typed settings; pure data."""

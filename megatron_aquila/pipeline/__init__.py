"""Order of work: schedules as data, their checks and simulator, and the one engine that runs them."""

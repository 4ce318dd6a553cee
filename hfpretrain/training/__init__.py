"""One training run: its set-up, records, watchdog, stops, stability and folder."""

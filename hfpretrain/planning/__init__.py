"""What a run costs before it starts: memory, time, network, devices."""

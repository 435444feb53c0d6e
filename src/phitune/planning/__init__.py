"""What a run will take, told before it starts: memory, time, and which settings fit."""

"""What a run tells: measures, events, checkpoints, summaries, progress."""

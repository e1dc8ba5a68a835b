"""What a run tells: measures, events, checkpoints, summaries, progress; the noise lab."""

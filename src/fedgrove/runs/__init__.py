"""One run from job to report: stage, prepare, loop, finish, leave, and its directory."""

"""Speech becomes text before the model sees it: `transcripts`, and `recogniser`, a process of its own."""

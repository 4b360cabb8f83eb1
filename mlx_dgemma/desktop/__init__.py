"""At home on a Mac: Quick Actions, Shortcuts, AppleScript, the user's settings, and the first run."""

"""Community add-ons to a system: tree edits and extra residuals, each a pure function of what it changes."""

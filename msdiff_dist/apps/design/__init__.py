"""`msdiff stages design`: short probe runs, laws of the loss fitted to them, and the stages they recommend."""

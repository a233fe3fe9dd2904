"""Use of a trained model on one's own videos."""

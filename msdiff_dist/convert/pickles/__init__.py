"""Files that Python's pickle and `torch.save` wrote, read as data: nothing that they name is imported or called."""

"""What teacher and student have in common: model folders and models, told apart by neither's role."""

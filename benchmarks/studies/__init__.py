"""Studies of unlearning: they train many models, take hours, and are no part of the wheel."""

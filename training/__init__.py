"""How the testbed model was made: data, curriculum, training loop, evaluation, export."""

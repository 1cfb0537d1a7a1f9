"""Read checkpoints without running code from them, also where mmengine reads them."""

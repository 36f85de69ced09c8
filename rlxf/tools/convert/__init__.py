"""Model weights from one layout on disk into another, without accelerator or process group."""

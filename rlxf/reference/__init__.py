"""The frozen model that DPO is measured against."""

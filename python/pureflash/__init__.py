"""PureFlash: shared, replicated block storage from the NVMe drives of ordinary servers."""

"""Test tools of PureFlash, for its own tests and for those of its users."""

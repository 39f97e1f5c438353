"""Helpers of the tests: small fakes and builders."""

"""Reducers: which hidden states go on to later layers in prefill."""

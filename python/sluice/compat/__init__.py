"""Interfaces of other libraries over this one: deep_ep's buffers, W4A8 experts as layers call them."""

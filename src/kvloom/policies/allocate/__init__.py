"""Allocators: how a budget is split over layers and heads."""

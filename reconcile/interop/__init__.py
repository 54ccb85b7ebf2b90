"""Interoperation with other stores and tools."""

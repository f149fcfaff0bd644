"""Tests of the library and of what is around it; they mirror the tree."""

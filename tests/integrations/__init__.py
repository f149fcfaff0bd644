"""Tests of nsa/integrations."""

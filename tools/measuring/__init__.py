"""What the measuring tools share: inputs, the accuracy gate, timing, stages, work, tables."""

"""`sedac chat`: a conversation in the terminal in which every token shows what was really skipped to make it."""

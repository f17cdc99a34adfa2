"""What is measured. A contender's process loads its own module alone, and does not pay for another's imports."""

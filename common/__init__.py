"""What server, hospital and simulator must agree on. Pure: knows no role."""

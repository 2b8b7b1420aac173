"""What two or more services need: contracts' domain types, errors, identity, store, transport."""

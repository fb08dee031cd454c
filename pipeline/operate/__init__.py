"""Looking at an output afterwards: inspect, verify, status. Reads receipts, footers and ranges; changes nothing."""

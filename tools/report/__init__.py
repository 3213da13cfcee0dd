"""`fleetune report RUN [RUN ...]`: what runs were asked, what was planned, what was measured, on one page that needs no network."""

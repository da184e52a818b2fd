"Requests in, text out: what a user of the library touches."

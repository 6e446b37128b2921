"""shmpool beside other pools and PgBouncer: HTTP requests under Gunicorn, as many server sessions for each."""

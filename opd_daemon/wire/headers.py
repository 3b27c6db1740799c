"""Names of the headers in calls and answers besides `authorization`."""

# With whom a caller shares a turn at the teacher.
CLIENT = "opd-client"
# In trailing metadata: the call's name in the daemon's log.
REQUEST_ID = "opd-request-id"

"""The one exception that is written for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: one clear line that names the file, key or value and says how to mend it.

    Scripts print `error: <message>` and exit with status 2; a traceback would add nothing.
    """

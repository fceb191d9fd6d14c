"""What a stem hears, as a picture: the command `demo`, its arithmetic, and the clips that come with it."""

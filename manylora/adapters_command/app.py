"""The words of `manylora adapters`, and the function behind each."""

import typer

from manylora.adapters_command import changing, exporting, fsck, looking

app = typer.Typer(no_args_is_help=True, help="The adapters of a running server, or of a data directory.")
app.command("ls")(looking.ls)
app.command("show")(looking.show)
app.command("add")(changing.add)
app.command("rm")(changing.rm)
app.command("versions")(looking.versions)
app.command("rollback")(changing.rollback)
app.command("canary")(changing.canary)
app.command("mix")(changing.mix)
app.command("export")(exporting.export)
app.command("push")(exporting.push)
app.command("fsck")(fsck.fsck)
# As they were called first.
app.command("list", hidden=True)(looking.ls)
app.command("remove", hidden=True)(changing.rm)
app.command("replace", hidden=True)(changing.replace)

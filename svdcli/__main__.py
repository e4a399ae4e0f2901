from svdcli.cli import main

main()

#!/bin/sh
# fleet-healthy [REST_S]: whether the orchestrator or worker of this container is well. Exit code 0 or 1, and a sentence.
#
# Its main loop touches FLEET_HEALTH_FILE once a second, a worker's from the time on that it has joined its orchestrator. A look at
# that costs 3 ms of CPU and no Python. `fleet doctor --health` asks over the bus instead, for people.
#
# REST_S is for engines that know no start_interval (Docker before 25): what was well rests so long before it is looked at again.
# So checks may follow each other quickly while it starts, and after a bad one, and cost their engine little later.
late_after_s=15
file=${FLEET_HEALTH_FILE:?names no file}
was_well=$file.was-well

if [ "${1:-0}" -gt 0 ] && [ -e "$was_well" ] && [ -e "$file" ]; then
    sleep "$1"
fi
if [ -n "$(find "$file" -newermt "-$late_after_s seconds" 2>/dev/null)" ]; then
    : >"$was_well"
    echo "the main loop turns"
elif [ -e "$file" ]; then
    rm -f "$was_well"
    echo "the main loop has not turned for $late_after_s s"
    exit 1
else
    rm -f "$was_well"
    echo "it still starts, waits for its orchestrator, or has ended"
    exit 1
fi

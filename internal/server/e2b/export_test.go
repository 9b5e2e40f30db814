package e2b

import "slices"

// Served lists the operations that are routed and not answered with 501.
func Served() []string {
	var operations []string
	for _, r := range (&api{}).table() {
		if !r.missing {
			operations = append(operations, r.method+" "+r.pattern)
		}
	}
	slices.Sort(operations)
	return operations
}

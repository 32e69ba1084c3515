package registry

import "strings"

// PatternOf returns the route that a request path is of, with names for what differs between its requests:
// /v2/<name>/blobs/<digest>, /v2/<name>/_ext/<resource>. It is empty for a path that is no route. Whoever decides by it
// decides about exactly what a Server does with the path.
func PatternOf(path string) string {
	p, below := strings.CutPrefix(path, "/v2")
	if !below || p != "" && p[0] != '/' {
		return ""
	}
	rt, ok := parseRoute(strings.TrimPrefix(p, "/"))
	if !ok {
		return ""
	}
	switch rt.kind {
	case "":
		return "/v2/"
	case "catalog":
		return "/v2/_catalog"
	case "extension":
		ext, rest, _ := strings.Cut(rt.arg, "/")
		resource, _, _ := strings.Cut(rest, "/")
		if rt.repo == "" {
			return "/v2/" + ext + "/" + resource
		}
		return "/v2/<name>/" + ext + "/" + resource
	}
	segments := "/v2/<name>/" + strings.Join(routeWords[rt.kind], "/")
	switch rt.kind {
	case "uploads":
		return segments + "/"
	case "upload":
		return segments + "/<session>"
	case "manifest":
		return segments + "/<reference>"
	case "blob", "referrers":
		return segments + "/<digest>"
	}
	return segments
}
